"""Proof: an auditor of histories, and what makes histories worth auditing."""
