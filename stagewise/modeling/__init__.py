"""From a name on the command line to a tokenizer and a model that can be trained."""
