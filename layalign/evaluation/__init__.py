"""Scoring, tasks, the evaluation loop and its reports. Import the module you need; nothing heavy is loaded here."""
