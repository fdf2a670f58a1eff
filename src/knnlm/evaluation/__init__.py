"""What a datastore changes about the prediction of a text: perplexity and explanations."""
