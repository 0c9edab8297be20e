"""What a run is: frozen, strict pydantic models, and how they are loaded from YAML, flags and DeepSpeed's JSON."""
