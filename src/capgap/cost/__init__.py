"""What a run or a sweep would take, told from its recipe: memory, FLOPs, time, disk. No torch."""
