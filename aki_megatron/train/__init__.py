"""The loop, the callbacks around it, and the only place where a run is constructed."""
