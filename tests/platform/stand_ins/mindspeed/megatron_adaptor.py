"""As in MindSpeed: patches as soon as it is imported."""

import sys

import mindspeed
from mindspeed.args_utils import get_mindspeed_args

mindspeed.record("megatron_adaptor", get_mindspeed_args())
assert "torch_npu.contrib.transfer_to_npu" in sys.modules
