"""One verb a file: each has `Config`, `INPUTS` and `main(config, stage)`."""
