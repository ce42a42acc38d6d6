-- Who only reads, for Grafana: anybody who may see a dashboard can have it ask other queries than its own.
CREATE ROLE reader LOGIN PASSWORD 'reader';
GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader;
ALTER ROLE reader SET statement_timeout = '30s';
ALTER ROLE reader SET work_mem = '64MB'; -- a week's rows are grouped in memory
ALTER ROLE reader SET jit = off;         -- compiling these queries takes longer than it saves
