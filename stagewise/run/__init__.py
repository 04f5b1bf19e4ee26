"""The life of a run: start, resume, train, save, evaluate, report. Handles any Trainer and knows no stage."""
