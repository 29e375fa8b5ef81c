"""The site: a long-lived worker that owns rows, keys, policy and the warm base."""
