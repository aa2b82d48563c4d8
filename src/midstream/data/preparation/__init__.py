"""Making a prepared source: units of work, shards, workers, rejects."""
