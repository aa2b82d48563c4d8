"""What every room stands on: identities, files written whole, counts, statistics, batches."""
