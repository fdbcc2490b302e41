"""From raw text to packed batches: documents, sentences, tokens, a dataset on disk, examples, masks. Knows no model."""
