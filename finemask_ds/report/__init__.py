"""Report: tables, figures and pages drawn from what runs left on disk."""
