"""Questions over annual reports."""
