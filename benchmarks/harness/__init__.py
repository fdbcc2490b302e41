"""What all benchmarks share: processes, timing, records, tables and plots; knows no benchmark."""
