"""From the ledger to a table, figures and one page."""
