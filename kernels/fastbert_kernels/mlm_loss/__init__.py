"""Masked-language-model loss: gather, vocabulary projection, softmax cross-entropy."""

from fastbert_kernels.mlm_loss.op import masked_cross_entropy as masked_cross_entropy
