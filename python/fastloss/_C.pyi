"""The compiled extension: pointers (tensor.data_ptr()) and sizes in, nothing out. csrc/fastloss.h says what each is."""

cuda: bool
archs: str

class Memory:
    """A block of bytes, a buffer, that goes back to the kept memory when nothing refers to it."""

    def __init__(self, bytes: int) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

def keep_memory(limit: int) -> int: ...
def best_isa() -> int: ...
def isa_name(isa: int) -> str: ...
def first_bad_target(target: int, n: int, v: int, ignore_index: int) -> int: ...
def cross_entropy_epilogue(
    target: int, class_weight: int, n: int, v: int, ignore_index: int, label_smoothing: float, z_loss: float, mean: bool,
    epilogue: int,
) -> float: ...  # fmt: skip
def cross_entropy_loss(
    target: int, class_weight: int, n: int, v: int, ignore_index: int, label_smoothing: float, z_loss: float, mean: bool,
    epilogue: int, stats: int,
) -> float: ...  # fmt: skip
def margin_loss_sum(
    target: int, n: int, v: int, ignore_index: int, mean: bool, loss: int, a: float, b: float, epilogue: int, stats: int
) -> float: ...
def row_stats_cpu(
    *, mode: int, logits: int, target: int, prob: int, column_weight: int, temperature: int, row: int, stats: int,
    argmax: int, dlogits: int, n: int, v: int, ld: int, ld_prob: int, ld_out: int, ignore_index: int, dtype: int,
    prob_dtype: int, want: int, scale: float, softcap: float, margin_loss: int = 0, margin_a: float = 0,
    margin_b: float = 0, isa: int,
) -> None: ...  # fmt: skip
def row_sample_cpu(
    *, logits: int, seed: int, streams: int, index: int, logp: int, n: int, v: int, ld: int, dtype: int, scale: float,
    softcap: float, isa: int,
) -> None: ...  # fmt: skip
def linear_cross_entropy_cpu(
    *, x: int, w: int, bias: int, target: int, column_weight: int, epilogue: int, stats: int, dx: int, dw: int,
    dbias: int, n: int, d: int, v: int, ldx: int, ldw: int, ignore_index: int, max_extra_bytes: int, dtype: int,
    want: int, scale: float, softcap: float, margin_loss: int = 0, margin_a: float = 0, margin_b: float = 0, isa: int,
) -> None: ...  # fmt: skip
def linear_cross_entropy_why_not(
    *, x: int, w: int, bias: int, target: int, column_weight: int, epilogue: int, stats: int, dx: int, dw: int,
    dbias: int, n: int, d: int, v: int, ldx: int, ldw: int, ignore_index: int, max_extra_bytes: int, dtype: int,
    want: int, scale: float, softcap: float, margin_loss: int = 0, margin_a: float = 0, margin_b: float = 0, isa: int,
) -> str | None: ...  # fmt: skip

class RowTerms:
    """The fields of csrc/row_terms.h."""

    def __init__(
        self, *, logits: int, listed: int, teacher: int, value: int, subset: int, temperature: int, coef: int, stats: int,
        argmax: int, dlogits: int, n: int, v: int, k: int, ld: int, ld_teacher: int, ld_out: int, ignore_index: int,
        dtype: int, teacher_dtype: int, mode: int, want: int, term: int, scale: float, softcap: float, a: float, b: float,
        c: float, nll_share: float = 0, term_share: float = 0,
    ) -> None: ...  # fmt: skip

def add_product_why_not(isa: int) -> str | None: ...
def add_product_cpu(
    *, total: int, a: int, b: int, rounded: int, n: int, v: int, d: int, lda: int, ldb: int, first: bool, isa: int
) -> None: ...
def row_terms_cpu(args: RowTerms, isa: int) -> None: ...
def device_count() -> int: ...
def device_info(device: int) -> str: ...
def row_stats_cuda(
    *, mode: int, logits: int, target: int, prob: int, column_weight: int, temperature: int, row: int, stats: int,
    argmax: int, dlogits: int, n: int, v: int, ld: int, ld_prob: int, ld_out: int, ignore_index: int, dtype: int,
    prob_dtype: int, want: int, scale: float, softcap: float, margin_loss: int = 0, margin_a: float = 0,
    margin_b: float = 0, device: int, stream: int, upstream: int,
) -> None: ...  # fmt: skip
def row_sample_cuda(
    *, logits: int, seed: int, streams: int, index: int, logp: int, n: int, v: int, ld: int, dtype: int, scale: float,
    softcap: float, device: int, stream: int,
) -> None: ...  # fmt: skip

MOST_LISTED: int

def row_terms_cuda(args: RowTerms, device: int, stream: int) -> None: ...
def scale_cuda(x: int, dtype: int, n: int, factor: int, device: int, stream: int) -> None: ...
def region_stats_cpu(
    *, logits: int, target: int, mask: int, coef: int, stats: int, dlogits: int, n: int, size: int, mask_share: int,
    dtype: int, target_dtype: int, want: int, sharpness: float, isa: int,
) -> None: ...  # fmt: skip
def region_stats_cuda(
    *, logits: int, target: int, mask: int, coef: int, stats: int, dlogits: int, n: int, size: int, mask_share: int,
    dtype: int, target_dtype: int, want: int, sharpness: float, slices: int, device: int, stream: int,
) -> None: ...  # fmt: skip

MOST_PARTIALS: int

_Elements = tuple[int, int, int]

def pointwise_loss_cpu(
    input: _Elements, target: _Elements, weight: _Elements, pos_weight: _Elements, upstream: _Elements, loss: int,
    values: _Elements, dinput: _Elements, n: int, kind: int, share: float, isa: int, /,
) -> None: ...  # fmt: skip
def pointwise_loss_cuda(
    input: _Elements, target: _Elements, weight: _Elements, pos_weight: _Elements, upstream: _Elements, loss: int,
    values: _Elements, dinput: _Elements, n: int, kind: int, share: float, partial: int, unless_one: bool, device: int,
    stream: int, /,
) -> None: ...  # fmt: skip

class EdgeDot:
    """The fields of csrc/pair_stats.h."""

    def __init__(
        self, *, q: int, k: int, m: int, n: int, d: int, ldq: int, ldk: int, edges: int, rows: int, columns: int,
        dots: int, dtype: int,
    ) -> None: ...  # fmt: skip

class EdgeSum:
    """The fields of csrc/pair_stats.h."""

    def __init__(
        self, *, x: int, weight: int, pointer: int, source: int, sums: int, m: int, n: int, d: int, ldx: int, edges: int,
        dtype: int,
    ) -> None: ...  # fmt: skip

def edge_dot_cpu(args: EdgeDot, isa: int) -> None: ...
def edge_sum_cpu(args: EdgeSum, isa: int) -> None: ...
def lowbit_matmul_cpu(
    *, x: int, planes: int, scale: int, x_scale: int, bias: int, y: int, m: int, ldx: int, rows: int, columns: int,
    weights: list[int], offset: int, scale_rows: int, groups: int, group: int, transposed: bool, x_dtype: int,
    y_dtype: int, isa: int,
) -> None: ...  # fmt: skip
def edge_dot_cuda(args: EdgeDot, device: int, stream: int) -> None: ...
def edge_sum_cuda(args: EdgeSum, device: int, stream: int) -> None: ...
def pair_map_cpu(
    *, pairing: Pairing, neg_threshold: int, pos_threshold: int, function: int, table: int, grad: int,
    gradients: tuple[int, int, int, int], isa: int,
) -> None: ...  # fmt: skip
def pair_histogram_cpu(
    *, pairing: Pairing, bins: int, first: float, step: float, table: int, grad: int, gradients: tuple[int, int, int, int],
    isa: int,
) -> None: ...  # fmt: skip
def row_topk_cpu(
    *, pairing: Pairing, count: int, classes: int, values: int, columns: int, isa: int
) -> None: ...  # fmt: skip

class Pairing:
    """The fields of csrc/pair_stats.h; ids and bits come as addresses, 0 for none."""

    def __init__(
        self, *, q: int, k: int, m: int, n: int, d: int, ldq: int, ldk: int, dtype: int, row_scale: int,
        column_scale: int, row_valid: int, column_valid: int, positive_rows: int, positive_columns: int,
        positive_diagonals: list[int], excluded_rows: int, excluded_columns: int, excluded_diagonals: list[int], low: int,
        high: int, guide_q: int, guide_k: int, guide_d: int, ld_guide_q: int, ld_guide_k: int, guide_dtype: int,
        guide_limit: int,
    ) -> None: ...  # fmt: skip

def pair_kept_floats(m: int, n: int) -> int: ...
def pair_stats_cpu(
    *, pairing: Pairing, boost: int, margin: int, want: int, second: float, rows: int, columns: int, row_grad: int = 0,
    column_grad: int = 0, gradients: tuple[int, int, int, int] = ..., kept: int, keep: int, isa: int,
) -> None: ...  # fmt: skip

class Planes:
    """The fields of csrc/bits.h."""

    def __init__(
        self, *, bits: int, popcounts: int, rows: int, columns: int, weights: list[int], offset: int
    ) -> None: ...

def has_bit_engine(engine: int) -> bool: ...
def bgemm_cpu(
    *, a: Planes, b: Planes, row_scale: int, column_scale: int, bias: int, activation: int, output: int, y: int,
    popcounts: int, stream: bool, isa: int, engine: int,
) -> None: ...  # fmt: skip
def hamming_topk_cpu(
    *, queries: Planes, database: Planes, scale: int, count: int, values: int, index: int, isa: int, engine: int
) -> None: ...  # fmt: skip

_Planes = tuple[int, int, int, int, list[int], int]

def bgemm_cuda(
    *, a: _Planes, b: _Planes, row_scale: int, column_scale: int, bias: int, activation: int, output: int, out: int,
    popcounts: int, plan: int, device: int, stream: int,
) -> None: ...  # fmt: skip
def hamming_topk_splits_cuda(m: int, n: int, device: int) -> int: ...
def hamming_topk_cuda(
    *, a: _Planes, b: _Planes, scale: int, count: int, keys: int, splits: int, values: int, index: int, plan: int,
    device: int, stream: int,
) -> None: ...  # fmt: skip
def lossless_linear_parts_cuda(rows: int, columns: int, device: int) -> int: ...
def lossless_linear_cuda(
    *, x: int, n: int, blob: int, plan: list[int], bias: int, out: int, parts: int, device: int, stream: int
) -> None: ...  # fmt: skip
def lossless_decode_cuda(
    *, blob: int, plan: list[int], first: int, count: int, out: int, device: int, stream: int
) -> None: ...  # fmt: skip
def lossless_rows_cuda(
    *, blob: int, plan: list[int], index: int, wide: bool, count: int, out: int, device: int, stream: int
) -> None: ...  # fmt: skip
def crc32c_pieces_cuda(size: int, block: int) -> int: ...
def crc32c_cuda(
    *, data: int, size: int, block: int, pieces: int, out: int, device: int, stream: int
) -> None: ...  # fmt: skip
def p7_histogram_cuda(
    *, numbers: int, numel: int, number: int, counts: int, device: int, stream: int
) -> None: ...  # fmt: skip
def p7_encode_cuda(
    *, numbers: int, numel: int, number: int, table: int, codes_of: int, codes: int, bytes: list[int], bits: int,
    escapes: int, device: int, stream: int,
) -> None: ...  # fmt: skip
def p7_escapes_cuda(
    *, numbers: int, numel: int, number: int, codes: int, offsets: int, positions: int, values: int, device: int,
    stream: int,
) -> None: ...  # fmt: skip
def byte_split_cuda(
    *, numbers: int, numel: int, number: int, field: int, bytes: list[int], bits: int, device: int, stream: int
) -> None: ...  # fmt: skip
def byte_histogram_cuda(*, plane: int, numel: int, counts: int, device: int, stream: int) -> None: ...

R8_SCRATCH: int

def r8_encode_cuda(
    *, plane: int, numel: int, frequencies: int, scratch: int, lengths: int, literals: int, device: int, stream: int
) -> None: ...  # fmt: skip
def r8_move_cuda(
    *, scratch: int, numel: int, literals: int, offsets: int, data: int, device: int, stream: int
) -> None: ...  # fmt: skip
def dfloat11_decode_cuda(
    *, luts: int, tables: int, codes: int, code_bytes: int, sign_mantissa: int, output_positions: int, gaps: int,
    gap_bytes: int, out: int, numel: int, threads: int, device: int, stream: int,
) -> None: ...  # fmt: skip

class FakeQuant:
    """csrc/cpu/fake_quant.h"""

    def __init__(
        self, *, grad: int, x: int, scale: int, offset: int, zero_point: int, out: int, dscale: int, doffset: int, n: int,
        groups: int, inner: int, low: float, high: float, steps: float, shift: float, rounded: bool,
        dtype: int,
    ) -> None: ...  # fmt: skip

class QuantizeGroups:
    """csrc/cpu/quantize_groups.h"""

    def __init__(
        self, *, x: int, low: int, high: int, seed: int, codes: int, lows: int, steps: int, n: int, group: int,
        channels: int, bits: int, dtype: int,
    ) -> None: ...  # fmt: skip

class DequantizeGroups:
    """csrc/cpu/quantize_groups.h"""

    def __init__(
        self, *, codes: int, lows: int, steps: int, x: int, n: int, group: int, bits: int, dtype: int
    ) -> None: ...

class SavedGradient:
    """csrc/cpu/saved_gradient.h"""

    def __init__(
        self, *, codes: int, lows: int, steps: int, grad: int, out: int, n: int, group: int, columns: int, bits: int,
        function: int, dtype: int,
    ) -> None: ...  # fmt: skip

def saved_gradient_cpu(args: SavedGradient, isa: int) -> None: ...
def fake_quant_cpu(args: FakeQuant, isa: int) -> None: ...
def quantize_groups_cpu(args: QuantizeGroups, isa: int) -> None: ...
def dequantize_groups_cpu(args: DequantizeGroups, isa: int) -> None: ...

_TokenRows = tuple[int, int, int]

def hash_attention_cpu(
    *, x: _TokenRows, w: _TokenRows, z: _TokenRows, alpha: int, beta: int, alpha_constant: float, own: float, d: int,
    bias: float, y: int, groups: int, queries: int, keys: int, direction: int, dtype: int, isa: int,
) -> None: ...  # fmt: skip
def hash_slopes_cpu(
    *, grad: int, out: int, d: int, inverse: int, slope: int, tokens: int, width: int, dtype: int, isa: int
) -> None: ...
def lossless_decode_cpu(
    *, blob: int, plan: list[int], item: int, first: int, count: int, out: int, isa: int
) -> None: ...  # fmt: skip
def lossless_decode_checked_cpu(*, blob: int, plan: list[int], item: int, out: int, isa: int) -> int: ...
def lossless_rows_cpu(
    *, blob: int, plan: list[int], item: int, index: int, count: int, out: int, isa: int
) -> int: ...  # fmt: skip
def crc32c_cpu(*, data: int, bytes: int, block: int, crcs: int, isa: int) -> None: ...
def crc32c_of_cpu(*, data: int, bytes: int, isa: int) -> int: ...
def crc32c_of_bytes_cpu(data: bytes, *, isa: int) -> int: ...
def r8_decode_cpu(
    *, frequencies: int, offsets: int, data: int, data_bytes: int, numel: int, out: int, isa: int
) -> None: ...  # fmt: skip

class RansPayloads:
    def bytes(self) -> int: ...
    def copy_to(self, data: int) -> None: ...

def r8_encode_cpu(*, plane: int, frequencies: int, numel: int, offsets: int, isa: int) -> RansPayloads: ...
def r8_frequencies_cpu(*, counts: int, log2: int, frequencies: int) -> bool: ...
def dfloat11_decode_cpu(
    *, luts: int, tables: int, codes: int, code_bytes: int, sign_mantissa: int, positions: int, gaps: int, numel: int,
    blocks: int, bytes_per_thread: int, threads_per_block: int, out: int,
) -> int: ...  # fmt: skip

class Escapes:
    """csrc/cpu/p7_encode.h"""

    @property
    def count(self) -> int: ...
    def any(self, plane: int) -> bool: ...
    def write(self, *, positions: int, values: int) -> None: ...

def p7_histogram_cpu(*, x: int, number: int, numel: int, counts: int, isa: int) -> None: ...
def p7_encode_cpu(
    *, x: int, number: int, numel: int, table: int, codes: int, planes: list[int], bits: int, offsets: int,
    block_crc: int, sums: int, isa: int,
) -> Escapes: ...  # fmt: skip
def byte_split_cpu(
    *, x: int, number: int, numel: int, field: int, planes: list[int], bits: int, isa: int
) -> None: ...  # fmt: skip
def byte_histogram_cpu(*, plane: int, numel: int, counts: int, isa: int) -> None: ...
def field_histogram_cpu(*, x: int, number: int, numel: int, counts: int, isa: int) -> None: ...
def r8_encode_numbers_cpu(
    *, x: int, number: int, numel: int, frequencies: int, planes: list[int], bits: int, offsets: int, data: int,
    room: int, block_crc: int, sums: int, isa: int,
) -> int: ...  # fmt: skip
def sample_planes_cpu(*, x: int, number: int, blocks: int, apart: int, counts: int, isa: int) -> None: ...
def lossless_linear_cpu(*, blob: int, plan: list[int], x: int, n: int, bias: int, out: int, isa: int) -> bool: ...
