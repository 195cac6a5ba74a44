"""From a scheme to a running kernel: `plan` decides, `generate` writes, `launch` runs, `compile` compiles without a GPU."""
