"""Published methods on top of the bit ops, one file a method.

Not here, for want of a formula: the weight compander ("Weight Compander: A Simple Weight Reparameterization for
Regularization"; no text with its function was at hand).
"""

from __future__ import annotations

from ..dynamic_sign import dynamic_sign
from ..elastic import ElasticQuantizer
from ..recu import recu_tau, recu_weight
from .bit_allocation import allocate_levels, gptq_columns
from .block_partition import activation_entropy, partition_blocks
from .elastic import (
    ElasticSetting,
    GuidanceLosses,
    guidance_losses,
    sample_setting,
    weight_distribution_loss,
)
from .key_value_bottleneck import KeyValueBottleneck, kmeans
from .lora_rounding import LoraRounding, block_windows, reconstruction_loss
from .outliers import outlier_threshold, truncate_outliers
from .qat_fraction import qat_fraction
from .recurrent_binarizer import (
    RecurrentBinarizer,
    inverse_norms,
    pack_recurrent,
    recurrent_binarizer_loss,
    symmetric_distance_topk,
)
from .reuse_order import ReuseOrder, hamming_distances, reuse_order, reuse_products
from .staircase_cache import StaircaseCache

__all__ = [
    "ElasticQuantizer",
    "ElasticSetting",
    "GuidanceLosses",
    "KeyValueBottleneck",
    "LoraRounding",
    "RecurrentBinarizer",
    "ReuseOrder",
    "StaircaseCache",
    "activation_entropy",
    "allocate_levels",
    "block_windows",
    "dynamic_sign",
    "gptq_columns",
    "guidance_losses",
    "hamming_distances",
    "inverse_norms",
    "kmeans",
    "outlier_threshold",
    "pack_recurrent",
    "partition_blocks",
    "qat_fraction",
    "reconstruction_loss",
    "recu_tau",
    "recu_weight",
    "recurrent_binarizer_loss",
    "reuse_order",
    "reuse_products",
    "sample_setting",
    "symmetric_distance_topk",
    "truncate_outliers",
    "weight_distribution_loss",
]
