"""The whole lowering, as one page of named steps."""

from __future__ import annotations

from fhe_fx.passes.allot_bits import AllotBits
from fhe_fx.passes.assign_scales import AssignScales
from fhe_fx.passes.base import Pipeline
from fhe_fx.passes.calibrate import Calibrate
from fhe_fx.passes.centre_sums import CentreSums
from fhe_fx.passes.choose_bases import ChooseBases
from fhe_fx.passes.choose_ranges import ChooseRanges
from fhe_fx.passes.distribute_linears import DistributeLinears
from fhe_fx.passes.drop_idle_maps import DropIdleMaps
from fhe_fx.passes.expand_matmuls import ExpandMatmuls
from fhe_fx.passes.fold_means import FoldMeans
from fhe_fx.passes.fold_scales import FoldScales
from fhe_fx.passes.fuse_linears import FuseLinears
from fhe_fx.passes.fuse_maps import FuseMaps
from fhe_fx.passes.hoist_maps import HoistMaps
from fhe_fx.passes.insert_refreshes import InsertRefreshes
from fhe_fx.passes.limit_factors import LimitFactors
from fhe_fx.passes.lower_softmax import LowerSoftmax
from fhe_fx.passes.lower_to_integers import LowerToIntegers
from fhe_fx.passes.merge_maps import MergeMaps
from fhe_fx.passes.normalize import Normalize
from fhe_fx.passes.products_to_squares import ProductsToSquares
from fhe_fx.passes.reduce_channels import ReduceChannels
from fhe_fx.passes.sink_pairs import SinkPairs
from fhe_fx.passes.sink_selections import SinkSelections
from fhe_fx.passes.split_inputs import SplitInputs
from fhe_fx.passes.untie_scales import UntieScales

__all__ = ["default_pipeline"]


def default_pipeline() -> Pipeline:
    """Return the pipeline from a captured region to integers and tables.

    It is a value: `default_pipeline().insert_after("fuse-maps", MyPass())` is another one, and
    `encrypt_submodule(..., passes=...)` takes it.
    """
    return Pipeline(
        (
            # Few operators, and nothing computed that nobody reads.
            Normalize(),
            SinkSelections(),
            FoldScales(may_copy=False),
            # Few channels wherever two encrypted matrices meet.
            Calibrate(),
            ReduceChannels(),
            Calibrate(),
            ChooseBases(),
            FuseLinears(),
            SinkSelections(),
            # No softmax, no matrix product of two encrypted tensors.
            LowerSoftmax(),
            SinkPairs(),
            SinkSelections(),
            ExpandMatmuls(),
            # One function of one tensor wherever there was a chain.
            FuseMaps(),
            HoistMaps(),
            # No product of two encrypted tensors.
            Calibrate(),
            LimitFactors(),
            FuseMaps(),
            Calibrate(),
            ProductsToSquares(),
            Calibrate(),
            DropIdleMaps(),
            FoldScales(),
            FuseMaps(),
            HoistMaps(),
            # Integers.
            DistributeLinears(),
            FoldMeans(),
            InsertRefreshes(),
            HoistMaps(),
            MergeMaps(),
            SplitInputs(),
            UntieScales(),
            Calibrate(),
            CentreSums(),
            Calibrate(),
            AllotBits(),
            ChooseRanges(),
            AssignScales(),
            LowerToIntegers(),
        )
    )
