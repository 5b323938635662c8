"""Operations that may have more than one implementation; one folder each, an XLA implementation that runs anywhere in every one."""
