"""What starts from a trained checkpoint: predictions, the report, the export and the demo page."""
