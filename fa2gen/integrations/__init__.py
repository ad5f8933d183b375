"""fa2gen under other packages: one module each, imported by who uses it. They import that package, fa2gen does not."""
