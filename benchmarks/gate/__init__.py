"""How often `espalier bench` errs on a real machine, beside tests that are commonly used."""
