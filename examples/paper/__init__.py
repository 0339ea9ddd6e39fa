"""Sets our runs beside the paper's: tables, verdicts on its claims, its figures, and the demo's report."""
