"""From raw text to packed batches: documents, sentences, tokens, a dataset, examples, masks.

Nothing here depends on the model.
"""
