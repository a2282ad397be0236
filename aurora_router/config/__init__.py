"""What users configure: settings, URLs, and the checks of single arguments."""
