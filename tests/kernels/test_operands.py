"""What the aligner's products make of their operands before a launch, and of settings that torch keeps for all."""

import pytest
import torch

pytestmark = pytest.mark.parametrize("backend", ["triton"], indirect=True)


@pytest.fixture
def operands(backend):
    return pytest.importorskip("layalign.kernels.layerwise_aligner.gpu.operands")


def test_lists_become_strides_forward_alone(operands):
    """A tensor descriptor's strides are unsigned: of weights in falling order each has its own pointer."""
    weights = torch.zeros(3, 32, 16, dtype=torch.float16)
    forward = operands.matrices(list(weights), 3)
    assert len(forward.pointers) == 1 and forward.group == weights.stride(0)
    backward = operands.matrices(list(weights)[::-1], 3)
    assert len(backward.pointers) == 3 and backward.group == 0
    same = operands.matrices([weights[0]] * 3, 3)
    assert len(same.pointers) == 1 and same.group == 0


def test_a_row_stride_of_0_is_no_descriptors(operands):
    row = torch.zeros(1, 64, dtype=torch.float16)
    assert operands.aligned(operands.matrices(row.expand(32, 64).contiguous(), 1))
    assert not operands.aligned(operands.matrices(row.expand(32, 64), 1))


@pytest.fixture
def legacy_again():
    """torch refuses to say its precision of fp32 products once the newer setting has been used: undone here."""
    yield
    torch.backends.fp32_precision = "none"
    torch.backends.cuda.matmul.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch has the older setting alone"
)
@pytest.mark.parametrize("where", [torch.backends, torch.backends.cuda.matmul])
@pytest.mark.parametrize(("said", "precision"), [("tf32", "high"), ("ieee", "highest")])
@pytest.mark.usefixtures("legacy_again")
def test_precision_of_fp32_products_by_the_newer_setting(backend, where, said, precision):
    """`TrainingArguments(tf32=True)` sets it so."""
    from layalign import adaptive_fusion_attention
    from layalign.kernels.launch import float32_precision

    where.fp32_precision = said
    assert float32_precision() == precision
    q, k = torch.randn(1, 1, 2, 16), torch.randn(1, 1, 3, 16)
    out = adaptive_fusion_attention(q, k, k, k, k, torch.ones(1), backend=backend)
    assert out.shape == q.shape


def test_queries_without_heads(backend):
    from layalign import adaptive_fusion_attention

    q, k = torch.randn(1, 0, 2, 16), torch.randn(1, 1, 3, 16)
    assert adaptive_fusion_attention(q, k, k, k, k, torch.ones(1), backend=backend).shape == q.shape
