"""From raw text to packed batches: documents, sentences, tokens, a store on disk, examples, masks. Knows no model."""
