# What the templates of this folder share: the site, and its options as --job_options of launcher/dispatch.py, which
# hands them on to sbatch for the cells. What has not the form of one is told before anything is submitted.

. "${FINEMASK_SITE:=jobs/slurm/site.sh}" || exit 2
export FINEMASK_SITE

JOB_OPTIONS=()
for option in "${SITE_OPTIONS[@]}"; do
    case $option in
        --*=*) JOB_OPTIONS+=("${option#--}") ;;
        --*) JOB_OPTIONS+=("${option#--}=") ;;
        *)
            echo "SITE_OPTIONS in $FINEMASK_SITE: type '$option' as a part of --NAME=VALUE, as in --partition=gpu" >&2
            exit 2
            ;;
    esac
done
