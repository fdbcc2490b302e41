"""SPECS: every operation by name; `tests/test_kernels.py` and the benchmarks walk it."""

from fastbert_kernels._spec import Spec
from fastbert_kernels.add_norm.spec import SPEC as ADD_NORM
from fastbert_kernels.attention.spec import SPEC as ATTENTION
from fastbert_kernels.embedding.spec import SPEC as EMBEDDING
from fastbert_kernels.geglu.spec import SPEC as GEGLU
from fastbert_kernels.gelu.spec import SPEC as GELU
from fastbert_kernels.mlm_loss.spec import SPEC as MLM_LOSS
from fastbert_kernels.norm.spec import SPEC as NORM
from fastbert_kernels.rotary.spec import SPEC as ROTARY

SPECS: dict[str, Spec] = {
    "attention": ATTENTION,
    "mlm_loss": MLM_LOSS,
    "norm": NORM,
    "add_norm": ADD_NORM,
    "gelu": GELU,
    "geglu": GEGLU,
    "rotary": ROTARY,
    "embedding": EMBEDDING,
}
