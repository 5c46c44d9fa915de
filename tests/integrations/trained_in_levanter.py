"""Levanter's own trainer with MuonClip, on tiny models: `bash tests/integrations/run.sh levanter`."""
