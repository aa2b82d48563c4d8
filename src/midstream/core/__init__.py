"""What every other package may use: identities, files, token counts, statistics, batches."""
