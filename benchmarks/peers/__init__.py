"""The harness of benchmarks/distillation.py: cases, engines, and the measurement of one."""
