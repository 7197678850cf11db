"""As in MindSpeed: patches as soon as it is imported, looking for what it replaces in every module there is."""

import sys

import torch

import mindspeed
from mindspeed.args_utils import get_mindspeed_args

mindspeed.record("megatron_adaptor", get_mindspeed_args())
assert "torch_npu.contrib.transfer_to_npu" in sys.modules
for module in list(sys.modules.values()):
    hasattr(module, "a_name_that_mindspeed_replaces")
torch.compile = lambda function=None, **options: function
