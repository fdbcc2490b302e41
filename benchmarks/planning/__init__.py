"""How far the predictions of `fastbert plan` are from what is measured."""
