from . import env_report

print(env_report())
