"""What a run will need and reach: memory, rooflines, devices."""
