"""The bit ops of the `cpp` backend: each module registers its kernels."""

from . import cpp_fake_quant as cpp_fake_quant
from . import cpp_groups as cpp_groups
