"""Stands in for MindSpeed-LLM, which patches by the words of the command line as soon as it is imported."""

import sys
from argparse import Namespace

import mindspeed

for module in list(sys.modules.values()):
    hasattr(module, "a_name_that_mindspeed_replaces")
mindspeed.record("mindspeed_llm", Namespace(words=sys.argv[1:]))
