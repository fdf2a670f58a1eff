"""How a datastore changes the prediction of a text: perplexity and explanations."""
