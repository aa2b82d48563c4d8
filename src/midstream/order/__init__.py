"""Which examples a stage sees, in which order: functions of lengths, budget and seed."""
