"""The passes: one a file. `pipelines.py` is the page to read first, `base.py` the contract."""

from fhe_fx.passes.annotate import Annotate
from fhe_fx.passes.base import Pass, PassRecord, Pipeline, get_pass, register, registered
from fhe_fx.passes.lowerings import register_lowering
from fhe_fx.passes.partition import Partition
from fhe_fx.passes.pipelines import default_pipeline

__all__ = [
    "Annotate",
    "Partition",
    "Pass",
    "PassRecord",
    "Pipeline",
    "default_pipeline",
    "get_pass",
    "register",
    "register_lowering",
    "registered",
]
