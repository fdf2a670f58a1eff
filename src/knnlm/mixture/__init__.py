"""Pure tensor mathematics of the kNN-LM; knows no file and no model."""
