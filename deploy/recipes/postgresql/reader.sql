-- A role that only reads, for Grafana: whoever may see a dashboard can send other queries than those in it. psql "$DATABASE" -f
-- reader.sql, by a user who may create roles.
CREATE ROLE reader LOGIN PASSWORD 'reader';
GRANT SELECT ON sentiment, sentiment_by_minute, sentiment_topics TO reader;
ALTER ROLE reader SET statement_timeout = '30s';
ALTER ROLE reader SET work_mem = '64MB'; -- a week's rows are grouped in memory
ALTER ROLE reader SET jit = off;         -- compiling these queries takes longer than it saves
