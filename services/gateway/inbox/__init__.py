"""Tickets that come in: a ticket system says that a customer wrote, and gets an answer or a suggestion written back."""
