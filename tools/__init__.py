"""Making what is shipped or drawn: behavior policies, mazes, reports. Nobody imports these."""
