"""The public formats that a preparation reads, record by record."""
