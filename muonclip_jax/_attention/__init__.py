"""Max logits: which pairs of queries and keys are visible, and the largest logit of each head."""
