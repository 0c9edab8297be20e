"""How the model is spread over ranks: discovery of the launcher, process groups, topology."""
