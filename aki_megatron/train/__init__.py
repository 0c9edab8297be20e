"""The loop, the hooks around it, and the only place where a run is constructed."""
